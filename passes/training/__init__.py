"""What needs gradients: recovery of a rewritten network, rank search by gradient, low-rank training from scratch."""
