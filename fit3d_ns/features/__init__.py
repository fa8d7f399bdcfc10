"""The mathematics of feature maps; knows no nerfstudio."""
