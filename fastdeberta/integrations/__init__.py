"""Other libraries' models on our kernels."""
