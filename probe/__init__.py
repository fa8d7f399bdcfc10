"""Linear probes of fit3d-ns: what original, fine-tuned and concatenated features are worth."""
