"""What the lessons draw: canvas and diagrams for all, the other files for one lesson each."""
