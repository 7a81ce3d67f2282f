"""Images: folders and MedMNIST, their splits, how they are decoded and augmented, and batches of them."""
