"""What a site admin runs before joining: does this machine have what the federation needs, and if not, what to do."""
