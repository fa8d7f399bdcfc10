"""Photos: which files a scene's views read, their pictures, lenses and masks, and the reader that gives them all."""
