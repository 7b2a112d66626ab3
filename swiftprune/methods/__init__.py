"""From statistics of the inputs to a mask and the weights that stay."""
