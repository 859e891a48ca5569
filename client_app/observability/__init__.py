"""What the site's own admin can watch; nothing of it is sent to the server."""
