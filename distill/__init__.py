"""Stage two of fit3d-ns: lifted features distilled back into a 2D backbone."""
