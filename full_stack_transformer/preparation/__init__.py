"""Documents -> dataset directory. Writes the contract that `datasets` reads; never imports torch."""
