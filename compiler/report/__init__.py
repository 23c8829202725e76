"""What a bundle says of itself: manifest and report.html."""
