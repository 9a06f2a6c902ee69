"""The target ``ios``: Core ML through XCTest on a phone or a Mac, else its operators by numpy."""
