"""What makes other people's libraries use the kernels."""
