"""The promises of the README, proved by commands."""
