"""Campaigns: long, seeded runs that look for what single tests miss; each is a command."""
