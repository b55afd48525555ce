"""`jaxllama check`: whether what was computed without devices holds on those at hand."""
