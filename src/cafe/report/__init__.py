"""Results become figures. No torch: a report is made of numbers that exist already."""
