"""Everything that is a user's file: photos, masks, cameras, seed points, splats, and the cache beside them."""
