"""Documents -> dataset directory. Writes what `datasets` reads; never imports torch."""
