"""Implementation of the commands; ``cli`` parses and prints."""
