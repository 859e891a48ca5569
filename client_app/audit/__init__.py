"""What came to the site and what left it, written down so that a change shows."""
