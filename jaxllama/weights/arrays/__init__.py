"""How the arrays of a checkpoint become files: cut into chunks, written to a folder or a bucket, named by Orbax."""
