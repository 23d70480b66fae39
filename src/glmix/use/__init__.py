"""Using models over many images: predictions, features, reports, and folders for hubs."""
