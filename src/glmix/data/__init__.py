"""Images, their labels and how they are prepared."""
