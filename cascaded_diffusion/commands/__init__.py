"""What the binaries share: flags, exit codes, JAX's settings."""
