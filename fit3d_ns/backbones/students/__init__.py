"""Fine-tuned backbones: the folder that a training leaves, its averages and formats, and the ones FiT3D published."""
