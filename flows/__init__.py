"""What a person triggers: the four flows, the run file and the command line."""
