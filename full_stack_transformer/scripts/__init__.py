"""The commands as files, so that they can be typed as paths; each only calls the command line."""
