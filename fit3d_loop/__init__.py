"""The command ``fit3d``: photos of many scenes in, a better backbone out, resumable, on one machine or a cluster."""
