"""Training recipe of the bundled model `tiny`."""
