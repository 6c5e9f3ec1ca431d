"""Files that come from users: text here, media in `decode`."""
