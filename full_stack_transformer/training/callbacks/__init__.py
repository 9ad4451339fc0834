"""What happens beside a training step: measuring, showing, exporting, saving, stopping."""
