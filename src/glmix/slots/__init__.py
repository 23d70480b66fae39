"""Looking at slots: one photo, a page, a whole folder, and in numbers."""
