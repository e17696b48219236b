"""What each script does; the one package that may know all the others."""
