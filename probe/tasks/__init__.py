"""What a probe can learn: segmentation, depth, surface normals."""
