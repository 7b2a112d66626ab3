"""The packed 2:4 format, its kernels and the linear layer over it."""
