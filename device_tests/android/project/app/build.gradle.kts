plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "edgeguard.devicetest"
    compileSdk = 35
    defaultConfig {
        applicationId = "edgeguard.devicetest"
        minSdk = 26
        targetSdk = 35
        testInstrumentationRunner = "androidx.test.runner.AndroidJUnitRunner"
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
    // The very files that every export carries.
    sourceSets["main"].kotlin.srcDir("../../../../edgeguard/export/samples/android")
    packaging { jniLibs.pickFirsts += "**/libc++_shared.so" }
}

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.22.0")
    // A runtime reads what its own release or an older one wrote; export.json names the release that wrote model.pte.
    implementation("org.pytorch:executorch-android:1.5.1")
    implementation("ai.djl.huggingface:tokenizers:0.33.0")
    implementation("ai.djl.android:tokenizer-native:0.33.0")
    androidTestImplementation("androidx.test:runner:1.6.2")
    androidTestImplementation("androidx.test.ext:junit:1.2.1")
}
