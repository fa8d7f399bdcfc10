"""Weight files: found on disk, in the offline extra or on the hub; read safely, in timm's key layout."""
