"""From a user's call to token ids: HTTP routes, Engine, chat templates."""
