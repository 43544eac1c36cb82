"""MMEB: its images, videos and visual documents."""
