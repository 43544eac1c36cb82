"""Results become pictures and pages. No torch: a report is made of numbers that exist already."""
