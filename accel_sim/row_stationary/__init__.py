"""A row-stationary array in the manner of Eyeriss: the price of a layer under a mapping, and the best mapping.

Source: Chen et al., "Eyeriss: An Energy-Efficient Reconfigurable Accelerator for Deep Convolutional Neural Networks",
JSSC 2017, whose letters the mappings have.
"""
