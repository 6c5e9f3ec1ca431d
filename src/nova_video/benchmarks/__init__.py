"""How fast a pipeline is, and how fast it could be. `nova bench ...` presents; nothing else imports this."""
