"""A model together with its photos: what pipeline, viewer and commands share."""
