"""The description of a bundle: manifest and report.html."""
