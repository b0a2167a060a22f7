"""Native code for CPUs: small, optional, and tested against the same references as everything else."""
