"""What each kind of device is and wants."""
