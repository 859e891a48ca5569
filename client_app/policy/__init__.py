"""What a data owner allows: settings, rules over what is asked, and what numbers may leave."""
