"""The price list: what a layer, a chain or a vector operation costs on a machine, in batches."""
