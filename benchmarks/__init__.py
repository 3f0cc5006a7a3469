"""Scripts that measure the published figures and build the embedded models; to be run from the root of a checkout."""
