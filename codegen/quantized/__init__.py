"""Integer networks: what a QDQ graph computes, as operations on bytes."""
