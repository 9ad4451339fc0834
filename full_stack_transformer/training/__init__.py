"""Dataset directory -> experiment directory. The only room that knows Lightning."""
