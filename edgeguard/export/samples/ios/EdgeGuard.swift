// A guard on iOS and macOS: text -> verdict, on the device, without a server.
//
//   import Tokenizers                                          // github.com/huggingface/swift-transformers
//   let library = try await AutoTokenizer.from(modelFolder: folder)
//   let edge = try EdgeGuard(folder: folder, model: EdgeGuard.compiled(package)) {
//       library.encode(text: $0, addSpecialTokens: false)
//   }
//   let verdict = try edge.judge([Message(role: "user", content: text)])
//   if verdict.action != "allow" { stop(verdict) }
//
// `folder`: this export; `package`: model.mlpackage, unzipped. iOS 18, macOS 15 or newer. Everything that goes wrong
// throws: treat that as "block", never as "allow". Call judge away from the main thread, one call at a time.

import CoreML
import CryptoKit
import Foundation

public struct Message: Codable, Sendable {
    public let role, content: String
    public init(role: String, content: String) { (self.role, self.content) = (role, content) }
}

public struct Verdict: Sendable {
    public let action: String
    public let pUnsafe, margin: Double
    public let hazards: [String: Double]
    public let target: String
    public let truncated: Bool
    public let tokens: Int
}

public struct GuardError: Error, CustomStringConvertible {
    public let description: String
    init(_ description: String) { self.description = description }
}

/// What this export needs of `manifest.json`.
public struct Manifest: Decodable, Sendable {
    public struct Template: Decodable, Sendable {
        public let opening: [String: [Int]]
        public let closing: [Int]
        public let read: [String: [Int]]
        public let reserved: [Int]
    }
    public struct Calibration: Decodable, Sendable { let temperature, bias: Double }
    public struct Point: Decodable, Sendable { let thresholds: [String: Double] }
    public struct Entry: Decodable, Sendable { let sha256: String; let bytes: Int }
    let format: String
    let format_version: Int
    public let max_tokens: Int
    public let template: Template
    public let head: [String]
    let calibration: [String: Calibration]
    let operating_points: [String: Point]
    let files: [String: Entry]
}

/// A line of `golden.jsonl`, and what a device makes of it.
public struct Golden: Decodable, Sendable {
    public let messages: [Message]
    public let target: String
    public let ids: [Int]
    public let margin, tolerance, p_unsafe: Double
    public let action: String
}

public struct Answer: Encodable, Sendable {
    public let ok, same_ids, same_rules: Bool
    public let margin, p_unsafe: Double
    public let action: String
}

/// A loaded export. Not for several threads at once.
public final class EdgeGuard {
    public let rules: Rules
    private let compiled: URL
    private let configuration: MLModelConfiguration
    private let tokenize: (String) -> [Int]
    private var models: [Int: MLModel] = [:]
    private let lengths: [Int]

    /// `model`: the compiled package; `units`: of compute that Core ML may use. Size and SHA-256 of the package's zip and of
    /// the tokenizer are compared with the manifest where they are in `folder`.
    public init(
        folder: URL, model: URL, units: MLComputeUnits = .all, lengths: [Int] = [64, 128, 256, 512],
        tokenize: @escaping (String) -> [Int]
    ) throws {
        let manifest = try JSONDecoder().decode(
            Manifest.self, from: Data(contentsOf: folder.appendingPathComponent("manifest.json")))
        guard manifest.format == "edgeguard-bundle", manifest.format_version == 1 else {
            throw GuardError("manifest.json: expected an edgeguard-bundle of version 1, found \(manifest.format)")
        }
        for name in ["model.mlpackage.zip", "tokenizer.json"] {
            let file = folder.appendingPathComponent(name)
            if FileManager.default.fileExists(atPath: file.path) { try EdgeGuard.verify(file, manifest.files[name]) }
        }
        rules = Rules(manifest)
        compiled = model
        self.tokenize = tokenize
        self.lengths = Set(lengths.filter { $0 < manifest.max_tokens } + [manifest.max_tokens]).sorted()
        configuration = MLModelConfiguration()
        configuration.computeUnits = units
    }

    /// Compile `model.mlpackage`, once: keep what is returned among the app's files. Xcode does the same at build time.
    public static func compiled(_ package: URL) throws -> URL { try MLModel.compileModel(at: package) }

    /// Judge the last of `messages`: a response where its role is assistant, else a prompt.
    public func judge(_ messages: [Message], point: String = "balanced") throws -> Verdict {
        let encoded = try rules.encode(messages, tokenize)
        let logits = try logits(encoded.ids)
        let margin = logits[1] - logits[0]
        let decided = try rules.decide(margin, encoded.target, encoded.truncated, point)
        let hazards = Dictionary(uniqueKeysWithValues: zip(rules.manifest.head, logits).dropFirst(2).map { ($0, sigmoid($1)) })
        return Verdict(
            action: decided.action, pUnsafe: decided.pUnsafe, margin: margin, hazards: hazards, target: encoded.target,
            truncated: encoded.truncated, tokens: encoded.ids.count)
    }

    /// Token ids -> logits, one a label of the manifest's head.
    public func logits(_ ids: [Int]) throws -> [Double] {
        guard let length = lengths.first(where: { $0 >= ids.count }) else { throw GuardError("\(ids.count) tokens are too many") }
        let row = MLShapedArray<Int32>(scalars: ids.map(Int32.init) + Array(repeating: 0, count: length - ids.count), shape: [1, length])
        let last = MLShapedArray<Int32>(scalars: [Int32(ids.count - 1)], shape: [1])
        let input = try MLDictionaryFeatureProvider(dictionary: [
            "input_ids": MLMultiArray(row), "last": MLMultiArray(last),
        ])
        let output = try model(length).prediction(from: input)
        guard let found = output.featureValue(for: "logits")?.multiArrayValue, found.count == rules.manifest.head.count else {
            throw GuardError("the model returned no logits of \(rules.manifest.head.count) labels")
        }
        return (0..<found.count).map { found[$0].doubleValue }
    }

    /// What this device makes of a line of `golden.jsonl`; `ok` says whether that is right.
    public func answer(_ line: Golden) throws -> Answer {
        let encoded = try rules.encode(line.messages, tokenize)
        let logits = try logits(encoded.ids)
        let margin = logits[1] - logits[0]
        let own = try rules.decide(margin, encoded.target, encoded.truncated)
        let golden = try rules.decide(line.margin, encoded.target, encoded.truncated)
        let sameIds = encoded.ids == line.ids
        let sameRules = golden.action == line.action && abs(golden.pUnsafe - line.p_unsafe) < 1e-6
        return Answer(
            ok: sameIds && sameRules && abs(margin - line.margin) <= line.tolerance, same_ids: sameIds, same_rules: sameRules,
            margin: margin, p_unsafe: own.pUnsafe, action: own.action)
    }

    /// The function of the package that reads rows of `length` tokens, loaded when it is first needed.
    private func model(_ length: Int) throws -> MLModel {
        if let loaded = models[length] { return loaded }
        let own = configuration.copy() as! MLModelConfiguration
        own.functionName = "tokens_\(length)"
        let loaded = try MLModel(contentsOf: compiled, configuration: own)
        models[length] = loaded
        return loaded
    }

    private static func verify(_ file: URL, _ entry: Manifest.Entry?) throws {
        let data = try Data(contentsOf: file, options: .mappedIfSafe)
        let found = SHA256.hash(data: data).map { String(format: "%02x", $0) }.joined()
        guard let entry, data.count == entry.bytes, found == entry.sha256 else {
            throw GuardError("\(file.lastPathComponent): not the file that manifest.json lists")
        }
    }
}

/// Conversation -> token ids, margin -> decision: `rules.py` in Swift.
public struct Rules: Sendable {
    public let manifest: Manifest
    private static let charsPerToken = 128 // at most: so huge text is cut before it is tokenized
    private static let judgedShare = 0.75 // of the room, for the judged message when the turns before it are long
    private static let few = 8 // tokens of a turn: fewer say nothing
    private static let blank: Set<Unicode.Scalar> = ["\0", " ", "\t", "\r", "\n"]

    public init(_ manifest: Manifest) { self.manifest = manifest }

    /// Throws for nothing to judge, and for ids that no text may yield.
    public func encode(_ messages: [Message], _ tokenize: (String) -> [Int]) throws
        -> (ids: [Int], target: String, truncated: Bool)
    {
        guard let judged = messages.last, judged.content.unicodeScalars.contains(where: { !Rules.blank.contains($0) }) else {
            throw GuardError("nothing to judge: the last message is empty")
        }
        let target = judged.role == "assistant" ? "response" : "prompt"
        let side = manifest.max_tokens * Rules.charsPerToken
        let clipped = messages.contains { $0.content.unicodeScalars.count > 2 * side }
        let bodies = messages.map { tokenize(Rules.clip($0.content, side)) }
        let reserved = Set(manifest.template.reserved)
        guard bodies.allSatisfy({ reserved.isDisjoint(with: $0) }) else {
            throw GuardError("the tokenizer turned text into a special token")
        }
        let openings = try messages.map { message in
            guard let opening = manifest.template.opening[message.role] else { throw GuardError("unknown role \(message.role)") }
            return opening
        }
        guard let read = manifest.template.read[target] else { throw GuardError("the template reads no \(target)") }
        let closing = manifest.template.closing
        let kept = Rules.fit(bodies, openings.map { $0.count + closing.count }, manifest.max_tokens - read.count)
        let first = bodies.count - kept.count
        let ids = kept.indices.flatMap { openings[first + $0] + kept[$0] + closing }
        let cut = first > 0 || kept.indices.contains { kept[$0].count < bodies[$0].count }
        return (ids + read, target, clipped || cut)
    }

    /// Margin -> p_unsafe and action: "allow", "block", or "escalate" where not all was read. Throws for what is no number.
    public func decide(_ margin: Double, _ target: String, _ truncated: Bool, _ point: String = "balanced") throws
        -> (pUnsafe: Double, action: String)
    {
        guard margin.isFinite else { throw GuardError("the model returned \(margin)") }
        guard let fitted = manifest.calibration[target],
            let threshold = manifest.operating_points[point]?.thresholds[target]
        else { throw GuardError("the manifest has no threshold \(point) for a \(target)") }
        let pUnsafe = sigmoid(margin / fitted.temperature + fitted.bias)
        guard pUnsafe.isFinite else { throw GuardError("p_unsafe is \(pUnsafe)") }
        return (pUnsafe, pUnsafe >= threshold ? "block" : truncated ? "escalate" : "allow")
    }

    private static func clip(_ text: String, _ side: Int) -> String {
        let scalars = text.unicodeScalars
        guard scalars.count > 2 * side else { return text }
        return String(String.UnicodeScalarView(scalars.prefix(side))) + String(String.UnicodeScalarView(scalars.suffix(side)))
    }

    /// Trim to `room` tokens: the judged message before the newest turns, head and tail of each.
    private static func fit(_ bodies: [[Int]], _ overheads: [Int], _ room: Int) -> [[Int]] {
        let lengths = bodies.map(\.count)
        if lengths.reduce(0, +) + overheads.reduce(0, +) <= room { return bodies }
        let last = bodies.count - 1
        let wanted = lengths[..<last].reduce(0, +) + overheads[..<last].reduce(0, +)
        let own = room - overheads[last]
        let share = min(wanted, Int(Double(room) * (1 - judgedShare)), own / 2)
        var kept = [cutMiddle(bodies[last], own - share)]
        var left = own - kept[0].count
        for index in stride(from: last - 1, through: 0, by: -1) {
            if left - overheads[index] < min(lengths[index], few) { break }
            kept.insert(cutMiddle(bodies[index], left - overheads[index]), at: 0)
            left -= overheads[index] + kept[0].count
        }
        return kept
    }

    private static func cutMiddle(_ ids: [Int], _ room: Int) -> [Int] {
        if ids.count <= room { return ids }
        let head = (room + 1) / 2
        return Array(ids[..<head]) + Array(ids[(ids.count - (room - head))...])
    }
}

private func sigmoid(_ x: Double) -> Double {
    x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)) // neither overflows
}
