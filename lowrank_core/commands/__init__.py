"""What each command of ``lowrank`` does; ``cli`` parses and prints."""
